"""Programs that measure: python -m benchmarks, and python -m benchmarks.NAME."""

from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    "Call a program; what its user can mend is told in one line."
    from tinytransformer.files import InputError

    try:
        main()
    except InputError as error:
        raise SystemExit(str(error)) from None
