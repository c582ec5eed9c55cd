"""Procedural rooms with exact geometry: a description in numpy, and a batched torch ray caster.

`generate(seed)` makes a `Scene` and `rig(...)` cameras around it; `stack([...])` puts any number of scenes on a device
and `render(...)` gives colour, z-depth, normals and masks for all their cameras in one call. The description depends
on numpy's generator alone, so a seed means the same scene everywhere.
"""

VERSION = 1
"""Enters cache keys: raise it whenever the same settings give other pixels."""
