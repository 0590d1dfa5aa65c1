"""``btx doctor``: what this machine, or this container, has of what training needs."""
