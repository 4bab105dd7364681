"""VMMC from Python: a put with a notification, a fetch, and a redirection.

python examples/vmmc_put.py
"""

import vmmc_emu
from vmmc_emu import Cluster
from vmmc_emu.vmmc import READ, WRITE

with (
    Cluster(nodes=2) as cluster,
    # One process on both nodes, to have it all on one page; they could be two, see vmmc_ping_pong.c.
    vmmc_emu.attach(node=0, cluster=cluster.name) as receiver,
    vmmc_emu.attach(node=1, cluster=cluster.name) as sender,
):
    # The receiver exports a buffer; the sender imports it, and may then write into it, one-sided.
    inbox = receiver.export(receiver.alloc(4096), "inbox", permissions=READ | WRITE)
    target = sender.import_(0, "inbox")

    letter = sender.alloc(4096)
    letter[:6] = b"hello!"
    target.send(letter[:6], 100, notify=True, tag=7)

    notice = inbox.notification()
    text = bytes(inbox.memory[notice.offset : notice.offset + notice.length])
    print(f"node{notice.node} put {text!r} at offset {notice.offset}, with tag {notice.tag}")

    # The sender reads it back, without a word to the receiving program.
    target.fetch(letter[1000:1006], 100)
    print(f"fetched back: {bytes(letter[1000:1006])!r}")

    # The receiver wants the next bytes elsewhere.  The sender need not know.
    elsewhere = receiver.alloc(4096)
    redirection = inbox.redirect(elsewhere[:1000], offset=200)
    target.send(letter[:6], 200)
    result = redirection.end()
    print(f"redirected: [{result.start}, {result.stop}) elsewhere: {bytes(elsewhere[: len(result)])!r}")
    assert bytes(inbox.memory[200:206]) == bytes(6)

    counters = cluster.node(0).counters()
    shown = ("bytes_received", "bytes_redirected", "bytes_default", "notifications")
    print({name: counters[name] for name in shown})
