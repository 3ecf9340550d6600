"""What is read and written on disk: a merge into a checkpoint, and adapters in the formats of other programs.

Merging needs no torch, so nothing is imported here.
"""
