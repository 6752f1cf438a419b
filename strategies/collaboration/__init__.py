"""How clients' updates become models."""
