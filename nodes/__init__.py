"""What runs behind a cluster: the supervisor, a daemon a node, and helpers on nodes.  Programs, no library."""
