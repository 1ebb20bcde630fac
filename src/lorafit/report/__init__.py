"""What people read of a run, made from its folder: the page with its pictures, the model card, numbers in words."""
