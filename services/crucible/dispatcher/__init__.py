"""The only creator of sandboxes."""
