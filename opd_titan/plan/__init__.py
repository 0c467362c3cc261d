"""Plan what a recipe needs on a cluster, with the program's own code and without a GPU."""
