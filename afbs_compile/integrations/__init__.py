"""Ways in for libraries that call attention through an interface of their own, where no graph is captured."""
