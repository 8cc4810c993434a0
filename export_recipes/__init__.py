"""Export recipes: data only, one recipe a file."""
