'use strict';

// Starts bcoin without a compiler: all its native parts have fallbacks of their own except murmur3 (its bloom filters),
// whose JavaScript version is taken only if NODE_BACKEND says so while it loads. Left set, that variable would also put
// every hash into JavaScript instead of Node's own OpenSSL.
process.env.NODE_BACKEND = 'js';
require('mrmr');
delete process.env.NODE_BACKEND;

// Standard input is a pipe that the test process holds open: its end means that the tests are gone, however they ended.
// It must not keep a node alive that has closed everything else.
process.stdin.resume();
process.stdin.unref();
for (const event of ['end', 'close', 'error'])
  process.stdin.on(event, () => process.kill(process.pid, 'SIGKILL'));

// A node of the tests talks to nobody it was not told of: no look-up of its public address, no seed.
require('bcoin/lib/net/pool').prototype.discoverExternal = async () => {};
require('bcoin/lib/protocol/networks').regtest.seeds = [];

require('bcoin/bin/node');
