"""The Bitcoin peer-to-peer protocol, sans-IO: bytes and time in, events and bytes out; not one socket in here."""
