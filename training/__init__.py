"""Recipe of the small networks, no part of the package: `python -m training.train_vggt` from the repository's root."""
