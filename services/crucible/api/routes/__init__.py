"""The routes of the API, by what they are about. They read parameters, call the part that does the work, and phrase answers."""
