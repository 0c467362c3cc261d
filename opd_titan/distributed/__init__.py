"""Processes, the device mesh, and the few collectives that the program needs by itself."""
