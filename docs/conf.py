"""The pages and the API reference: sphinx-build -W docs output/docs."""

import importlib.util

project = "maskx"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["*.ipynb"]
if not importlib.util.find_spec("detectron2"):
    exclude_patterns.append("api_detectron2.md")  # its classes derive from Detectron2's
default_role = "code"
add_module_names = False
python_use_unqualified_type_names = True
napoleon_use_rtype = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "special-members": "__call__"}
