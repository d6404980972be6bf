"""A run on paper: what a layout would cost on a cluster, by formula."""
