"""Four real corpora from what every machine has: prose, code, mathematics, and an invented encyclopedia."""
