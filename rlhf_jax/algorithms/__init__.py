"""Updates as pure functions. Each module has Config, Hyper, State, init and make_update."""
