"""Records that cross steps: recipe, manifest, trajectory, score. Standard library and pydantic only."""
