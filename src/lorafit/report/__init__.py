"""Reports for people: the folder of a run goes in; a page with pictures, a model card, and sentences come out."""
