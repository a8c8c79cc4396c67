"""`./run demo`: the whole product on one machine, fed by a regtest node of its own."""
