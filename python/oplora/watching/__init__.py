"""What a run is watched by: the numbers of every layer, written down and drawn, and a distance between pictures."""
