"""Cameras, transforms, depth, alignment and metrics. Imports numpy (and scipy, numba where stated), nothing heavy.

Conventions of the whole project: OpenCV camera axes (x right, y down, z forward); `T_world_cam` maps camera points
to the world; pixel centres at integer coordinates (u = column, v = row); depth is z along the optical axis, 0 where
there is none; images are RGB uint8.
"""
