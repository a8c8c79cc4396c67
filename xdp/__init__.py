"""The kernel side of Sprint and its Python face: XDP programs, AF_XDP sockets, links. Imports nothing from sprint."""
