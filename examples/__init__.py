"""Scripts that show the package at work; a package itself, so that none of this name elsewhere is found before it."""
