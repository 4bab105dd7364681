"""What runs behind a cluster: the supervisor, a daemon a node, helpers on nodes.  Programs, no library."""
