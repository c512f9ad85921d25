"""One file a layout on disk; data/open.py lists them."""
