"""Recipe of the small networks: run as `python -m training.train_vggt` from the repository's root. Not part of the package."""
