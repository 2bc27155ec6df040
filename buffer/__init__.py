"""The durable data buffer: prompts, their order, the ledger of their fates, and the samples they became.

    local                   the buffer of a run: all of what follows, for who rolls out and who trains
      policy                which instance goes where next
      leases, intake        what is out; what is handed in
      drops, changes        what is dropped; who is woken
      restore               what a run that continues has in its ledger
    ledger                  the moves of instances, over storage (its file), schema (its tables), records (its values)
    payload, nesting        a group as bytes; how deep JSON from elsewhere may go
    lock, samples, difficulty       other files of a run
    prompts/                where prompts come from: files, their index, their order
    service/                the buffer over HTTP, and its client
    books/                  reading a ledger: audit, numbers, lives, export
    chaos/                  the service under kill -9, held against what its clients saw

Begin with `buffer.local`.
"""
