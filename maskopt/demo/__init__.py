"""A small demo model, trained on the Python standard library, and the text that it was trained on."""
