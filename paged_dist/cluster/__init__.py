"""The processes of a run: how they start together, and how each sees that another is lost."""
