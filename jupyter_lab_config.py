"""`jupyter lab`, started here, opens at the book's first page."""
c.LabApp.default_url = "/lab/tree/nbs/index.ipynb"  # noqa: F821: Jupyter provides `c`
