"""What every room stands on: errors in one line, whole files, manifests, words of a command line."""
