"""What a recipe will need on a cluster, from the program's own code and without a GPU."""
