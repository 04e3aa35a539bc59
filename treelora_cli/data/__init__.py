"""Reading task data: paths, tables and image folders; detection and validation, no model code."""
