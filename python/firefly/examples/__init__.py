"""Small, complete programs: read them top to bottom, then change them."""
