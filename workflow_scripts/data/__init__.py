"""Image sources, preprocessing, and the catalog of what images each class has."""
