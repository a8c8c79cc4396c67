import random
from tests.net.test_capture_program import *
from tests.net.test_capture_program import UNPLACED
def run(bench, msgs, size, lose, window, name, n):
    bench.forget()
    wire=Wire(sequence=0xFFF00000); syn=wire.syn()
    stream=b"".join(msgs)
    segs=wire.cut(stream,size)
    # find a segment that holds a boundary near index lose
    bounds=set(); at=0
    for m in msgs:
        bounds.add(at//size); at+=len(m)
    k=next(i for i in range(lose,len(segs)) if i in bounds)
    order=segs[:k]+segs[k+1:k+1+window]+[segs[k]]+segs[k+1+window:]
    bench.all([syn])
    unpl=[]
    for i,s in enumerate(order):
        for c in bench.all([s]):
            if c.reasons & UNPLACED: unpl.append(i)
    after=[i for i in unpl if i>k+window]
    print(f"{name:28s} size {size:6d} segs {len(segs):6d} lost at {k} window {window}: unplaced before-retx {len(unpl)-len(after)} after {len(after)} last {after[-1]-k-window if after else 0} opaque {bench.counts('opaque_flows')}", flush=True)
def test_x(bench):
    rng=random.Random(1)
    def blk(n): return packets.message("block", packets.filler(10)+rng.randbytes(n))
    def txs(lo,hi): return packets.message("tx", rng.randbytes(rng.randrange(lo,hi)))
    big=[blk(1_500_000) for _ in range(4)]
    mid=[packets.message("blocktxn", rng.randbytes(rng.randrange(20_000,40_000))) for _ in range(400)]
    small=[txs(150,500) for _ in range(12000)]
    early=[packets.block(215) for _ in range(12000)]
    mixed=[txs(150,3000) if rng.random()<.9 else packets.message("inv", bytes([35])+ (b"\1\0\0\0"+bytes(32))*35) for _ in range(4000)]
    for msgs,name in ((big,"blocks 1.5MB"),(mid,"20-40kB"),(small,"tx 150-500"),(early,"blocks 239"),(mixed,"tx..3000/inv")):
        for size in (1448,32000):
            run(bench,msgs,size,20,30 if size==1448 else 3,name,0)
        run(bench,msgs,1448,20,0,name+" reorder0",0)
        run(bench,msgs,1448,20,3,name+" w3",0)
    assert 0
