"""The live half: frames in, depth, alignment to the map, fusion."""
