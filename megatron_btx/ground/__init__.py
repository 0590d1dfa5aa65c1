"""What every room stands on: errors in one line, whole files, manifests, and which process of a run this is."""
