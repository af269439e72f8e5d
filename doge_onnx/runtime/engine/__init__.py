"""How a graph is run: sessions, devices, states, and one runner for each kind of bundle."""
