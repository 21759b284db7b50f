"""What puts this package into engines, a module per engine. Each imports its engine when it is called."""
