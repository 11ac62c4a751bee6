//! Single rules of the machine; the protocol as a whole is proven by `sim`.

use super::*;
use firefly_types::{
    AttemptEpoch, ChainId, ChainVersion, ChunkId, ClientId, DataId, ErrorKind, Generation, JobId, Nanos,
    SessionEpoch, TargetId, WireError,
};

const NOW: Nanos = Nanos(1_000);
const LEASE: Nanos = Nanos(1_000_000_000);
const CHUNK: ChunkId = ChunkId { data: DataId(1), generation: Generation(0), index: 0 };

fn view(version: u64, serving: &[u32], syncing: Option<u32>, min_write_replicas: u32) -> ChainView {
    ChainView {
        id: ChainId(1),
        version: ChainVersion(version),
        serving: serving.iter().map(|t| TargetId(*t)).collect(),
        syncing: syncing.map(TargetId),
        min_write_replicas,
    }
}

fn target(id: u32, view: ChainView) -> Target<Vec<u8>> {
    let options = TargetOptions { queue: 2, ..TargetOptions::default() };
    let mut target = Target::new(TargetId(id), 1, options, Recovered::default());
    target.step(Event::Lease(LEASE), NOW);
    target.step(Event::Chain(view), NOW);
    target
}

fn context(sequence: u64) -> Context {
    Context {
        client: ClientId(1),
        session_epoch: SessionEpoch(5),
        channel: 0,
        sequence,
        attempt: AttemptEpoch(2),
        job: JobId(3),
    }
}

fn write(sequence: u64) -> Update<Vec<u8>> {
    Update {
        context: context(sequence),
        chunk: CHUNK,
        kind: Kind::Write,
        offset: 0,
        length: 4,
        crc: payload_crc(b"data"),
        chunk_bytes: 1 << 20,
        payload: Some(b"data".to_vec()),
    }
}

fn ask(target: &mut Target<Vec<u8>>, reply: Handle, update: Update<Vec<u8>>) -> Vec<Action<Vec<u8>>> {
    let chain_version = target.chain().unwrap().version;
    target.step(Event::Update { reply, chain_version, update }, NOW)
}

fn replies(actions: &[Action<Vec<u8>>]) -> Vec<(Handle, Result<Answer, ErrorKind>)> {
    let reply = |a: &Action<Vec<u8>>| match a {
        Action::Reply { reply, result } => Some((*reply, result.clone().map_err(|e| e.kind))),
        _ => None,
    };
    actions.iter().filter_map(reply).collect()
}

fn written(target: &mut Target<Vec<u8>>, actions: &[Action<Vec<u8>>]) -> Vec<Action<Vec<u8>>> {
    let (id, version) = actions
        .iter()
        .find_map(|a| match a {
            Action::Write { id, version, .. } => Some((*id, *version)),
            _ => None,
        })
        .expect("a write was asked for");
    target.step(Event::Written { chunk: CHUNK, id, result: Ok(meta(version)) }, NOW)
}

fn meta(version: u64) -> Meta {
    Meta { version, length: 4, digest: version as u32 }
}

fn forwarded(actions: &[Action<Vec<u8>>]) -> Option<Forward<Vec<u8>>> {
    actions.iter().find_map(|a| match a {
        Action::Forward { forward, .. } => Some(forward.clone()),
        _ => None,
    })
}

#[test]
fn one_replica_is_head_and_tail() {
    let mut alone = target(1, view(1, &[1], None, 1));
    let actions = ask(&mut alone, 1, write(1));
    assert!(replies(&actions).is_empty(), "not before it is durable");
    let actions = written(&mut alone, &actions);
    assert!(matches!(actions[0], Action::Commit { version: 1, .. }));
    assert_eq!(replies(&actions), [(1, Ok(Answer::Updated(meta(1))))]);
    // The retry is answered from the record.
    let again = replies(&ask(&mut alone, 2, write(1)));
    assert!(matches!(again[..], [(2, Ok(Answer::Updated(Meta { version: 1, length: 4, .. })))]));
}

#[test]
fn the_head_writes_and_forwards_at_once_and_answers_last() {
    let mut head = target(1, view(1, &[1, 2], None, 2));
    let actions = ask(&mut head, 1, write(1));
    let forward = forwarded(&actions).expect("forwarded while it is being written");
    assert_eq!((forward.version, forward.base, forward.prefix), (1, 0, None));
    let actions = written(&mut head, &actions);
    assert!(matches!(actions[..], [Action::Token { token: Token { meta: m, .. }, .. }] if m == meta(1)));
    let answer = Event::ForwardAnswer { chunk: CHUNK, stamp: forward.stamp, result: Ok(meta(1)) };
    assert_eq!(replies(&head.step(answer, NOW)), [(1, Ok(Answer::Updated(meta(1))))]);
}

#[test]
fn the_tail_waits_for_the_token_also_if_it_came_first() {
    for token_first in [false, true] {
        let mut head = target(1, view(1, &[1, 2], None, 1));
        let mut tail = target(2, view(1, &[1, 2], None, 1));
        let asked = ask(&mut head, 1, write(1));
        let forward = forwarded(&asked).unwrap();
        let token = written(&mut head, &asked)
            .into_iter()
            .find_map(|a| match a {
                Action::Token { token, .. } => Some(token),
                _ => None,
            })
            .unwrap();
        let send_token = |tail: &mut Target<Vec<u8>>| tail.step(Event::Token { reply: 8, token }, NOW);
        if token_first {
            send_token(&mut tail);
        }
        let actions = tail.step(Event::Forward { reply: 7, forward }, NOW);
        let mut last = written(&mut tail, &actions);
        if !token_first {
            assert!(replies(&last).is_empty());
            last = send_token(&mut tail);
        }
        assert!(replies(&last).contains(&(7, Ok(Answer::Updated(meta(1))))), "token first: {token_first}");
    }
}

#[test]
fn a_replica_that_differs_goes_offline_before_it_commits() {
    let mut head = target(1, view(1, &[1, 2], None, 1));
    let mut tail = target(2, view(1, &[1, 2], None, 1));
    let mut forward = forwarded(&ask(&mut head, 1, write(1))).unwrap();
    forward.prefix = Some(Meta { digest: 99, ..meta(1) });
    let actions = tail.step(Event::Forward { reply: 7, forward }, NOW);
    let actions = written(&mut tail, &actions);
    assert!(actions.iter().any(|a| matches!(a, Action::Offline(why) if why.contains("differs"))));
    assert!(!actions.iter().any(|a| matches!(a, Action::Commit { .. })));
}

#[test]
fn every_epoch_is_checked_in_every_request() {
    let mut head = target(1, view(7, &[1], None, 1));
    let refusal = |target: &mut Target<Vec<u8>>, version, update| {
        let chain_version = ChainVersion(version);
        let actions = target.step(Event::Update { reply: 1, chain_version, update }, NOW);
        replies(&actions).pop().map(|(_, r)| r.unwrap_err())
    };
    assert_eq!(refusal(&mut head, 6, write(1)), Some(ErrorKind::Stale));
    assert_eq!(refusal(&mut head, 8, write(1)), Some(ErrorKind::Stale));
    ask(&mut head, 1, write(1));
    let mut old_session = write(2);
    old_session.context.session_epoch = SessionEpoch(4);
    assert_eq!(refusal(&mut head, 7, old_session.clone()), Some(ErrorKind::Stale));
    let mut old_attempt = write(2);
    old_attempt.context.attempt = AttemptEpoch(1);
    assert_eq!(refusal(&mut head, 7, old_attempt), Some(ErrorKind::Stale));
    let mut long = write(3);
    long.offset = (1 << 20) - 3;
    assert_eq!(refusal(&mut head, 7, long), Some(ErrorKind::InvalidArgument));
    // Reads too, and nothing without a lease.
    let version = ChainVersion(7);
    assert_eq!(head.read(&old_session.context, version, CHUNK, NOW).unwrap_err().kind, ErrorKind::Stale);
    assert!(head.read(&context(0), version, CHUNK, NOW).is_ok());
    assert_eq!(head.read(&context(0), version, CHUNK, LEASE).unwrap_err().kind, ErrorKind::Unavailable);
    let mut second = target(2, view(7, &[1, 2], None, 1));
    assert_eq!(refusal(&mut second, 7, write(1)), Some(ErrorKind::Stale), "only the head takes updates");
    let mut few = target(1, view(7, &[1], None, 2));
    assert_eq!(refusal(&mut few, 7, write(1)), Some(ErrorKind::Unavailable));
}

#[test]
fn updates_of_one_chunk_wait_in_a_bounded_line() {
    let mut head = target(1, view(1, &[1], None, 1));
    let first = ask(&mut head, 1, write(1));
    let mut other = |n: u64| {
        let mut update = write(1);
        update.context.client = ClientId(n);
        ask(&mut head, n, update)
    };
    assert!(other(2).is_empty());
    assert!(other(3).is_empty());
    assert_eq!(replies(&other(4)), [(4, Err(ErrorKind::Unavailable))]);
    // A retry of one that waits joins it and takes no place.
    assert!(other(3).is_empty());
    let second = written(&mut head, &first);
    let third = written(&mut head, &second);
    let last = written(&mut head, &third);
    assert_eq!(replies(&last).iter().map(|r| r.0).collect::<Vec<_>>(), [3, 3]);
}

#[test]
fn a_full_successor_refuses_and_nothing_is_half_done() {
    let mut head = target(1, view(1, &[1, 2], None, 1));
    let asked = ask(&mut head, 1, write(1));
    let stamp = forwarded(&asked).unwrap().stamp;
    let full = Err(WireError::new(ErrorKind::NoSpace, "full"));
    // The refusal comes while the head still writes: it ends when the write has ended.
    assert!(head.step(Event::ForwardAnswer { chunk: CHUNK, stamp, result: full }, NOW).is_empty());
    let actions = written(&mut head, &asked);
    assert!(matches!(actions[0], Action::Drop { version: 1, .. }));
    assert_eq!(replies(&actions), [(1, Err(ErrorKind::NoSpace))]);
    assert_eq!(head.busy_chunks(), 0);
    assert!(head.read(&context(0), ChainVersion(1), CHUNK, NOW).unwrap().meta.is_none());
}

#[test]
fn a_recovered_update_is_served_neither_way_until_it_is_settled() {
    let pending =
        RecoveredPending { chunk: CHUNK, base: 0, meta: meta(1), removes: false, context: context(1) };
    let recovered = Recovered { pending: vec![pending], ..Recovered::default() };
    let mut tail: Target<Vec<u8>> = Target::new(TargetId(2), 2, TargetOptions::default(), recovered);
    tail.step(Event::Lease(LEASE), NOW);
    let actions = tail.step(Event::Chain(view(4, &[1, 2], None, 1)), NOW);
    let Some(Action::Resolve { touch, query, .. }) = actions.first() else { panic!("{actions:?}") };
    assert_eq!((query.version, query.base), (1, 0));
    let read = tail.read(&context(0), ChainVersion(4), CHUNK, NOW);
    assert_eq!(read.unwrap_err().kind, ErrorKind::Unavailable);
    let answer = Event::ResolveAnswer { chunk: CHUNK, touch: *touch, resolution: Resolution::Unknown };
    assert!(matches!(tail.step(answer, NOW)[..], [Action::Drop { version: 1, .. }]));
    assert!(tail.read(&context(0), ChainVersion(4), CHUNK, NOW).unwrap().meta.is_none());
}

#[test]
fn an_update_is_not_acknowledged_on_fewer_replicas_than_writes_need() {
    // Admitted with two replicas; one goes before it has answered.
    let mut head = target(1, view(1, &[1, 2], None, 2));
    let asked = ask(&mut head, 1, write(1));
    written(&mut head, &asked);
    let actions = head.step(Event::Chain(view(2, &[1], None, 2)), NOW);
    assert!(actions.iter().any(|a| matches!(a, Action::Commit { version: 1, .. })));
    assert_eq!(replies(&actions), [(1, Err(ErrorKind::Unavailable))]);
    // Every kind of update is refused meanwhile, also without a client (removal of ranges).
    for kind in [Kind::Write, Kind::Truncate, Kind::Remove, Kind::Punch] {
        for context in [context(2), Context::default()] {
            let update = Update { kind, context, ..write(2) };
            assert_eq!(replies(&ask(&mut head, 2, update)), [(2, Err(ErrorKind::Unavailable))], "{kind:?}");
        }
    }
    assert_eq!(replies(&ask(&mut head, 3, write(1))), [(3, Err(ErrorKind::Unavailable))]);
    // Healed: the retry is answered from the record, not done again.
    head.step(Event::Chain(view(3, &[1, 2], None, 2)), NOW);
    let again = ask(&mut head, 4, write(1));
    assert!(matches!(replies(&again)[..], [(4, Ok(Answer::Updated(Meta { version: 1, .. })))]), "{again:?}");
    // With one replica allowed the same is acknowledged.
    let mut lenient = target(1, view(1, &[1, 2], None, 1));
    let asked = ask(&mut lenient, 1, write(1));
    written(&mut lenient, &asked);
    let actions = lenient.step(Event::Chain(view(2, &[1], None, 1)), NOW);
    assert!(matches!(replies(&actions)[..], [(1, Ok(_))]));
}

#[test]
fn what_was_reported_absent_to_a_target_that_is_filled_can_be_created_with_any_version() {
    let mut filled = target(2, view(3, &[1], Some(2), 1));
    let forward = |sequence, version, kind| {
        let mut update = Update { kind, context: Context::default(), ..write(1) };
        if kind == Kind::Remove {
            (update.payload, update.length) = (None, 0);
        }
        Forward {
            from: TargetId(1),
            chain_version: ChainVersion(3),
            stamp: Stamp { incarnation: 1, sequence },
            base: 0,
            version,
            update,
            prefix: Some(meta(version)),
        }
    };
    // The removal of something known is another matter: a copy of before may still be sent.
    let mut other = target(2, view(3, &[1], Some(2), 1));
    let removal = Forward { base: 1, ..forward(5, 2, Kind::Remove) };
    let actions = other.step(Event::Forward { reply: 1, forward: removal }, NOW);
    assert!(matches!(replies(&written(&mut other, &actions))[..], [(1, Ok(_))]));
    let copy = Event::Forward { reply: 2, forward: forward(6, 1, Kind::Replace) };
    assert_eq!(replies(&other.step(copy, NOW)), [(2, Err(ErrorKind::Stale))]);

    let step = |filled: &mut Target<_>, reply, forward| filled.step(Event::Forward { reply, forward }, NOW);
    let actions = step(&mut filled, 1, forward(5, 9, Kind::Remove));
    assert!(matches!(replies(&written(&mut filled, &actions))[..], [(1, Ok(_))]));
    // What was sent before is late, whatever its version; what was sent after is not.
    let late = step(&mut filled, 2, forward(4, 20, Kind::Replace));
    assert_eq!(replies(&late), [(2, Err(ErrorKind::Stale))]);
    let actions = step(&mut filled, 3, forward(6, 1, Kind::Replace));
    assert!(matches!(replies(&written(&mut filled, &actions))[..], [(3, Ok(_))]), "{actions:?}");
}
