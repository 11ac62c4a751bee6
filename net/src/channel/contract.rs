//! What every channel promises, as one test body for all carriers; driven as a progress thread would
//! drive them: by `poll` alone.

use super::*;
use std::time::Duration;

/// Generous: a test that waits for it has failed.
pub(super) const LONG: Duration = Duration::from_secs(60);

/// Two ends of one channel.
pub(super) type Pair = (Box<dyn Channel>, Box<dyn Channel>);

pub(super) fn header(n: u64) -> [u8; HEADER_BYTES] {
    let mut out = [0xCC; HEADER_BYTES];
    out[..8].copy_from_slice(&n.to_le_bytes());
    out
}

/// Waits until one of the channels can move.
fn wait(channels: &[&dyn Channel]) {
    let mut fds = Vec::new();
    channels.iter().for_each(|c| c.poll_fds(&mut fds));
    let mut fds: Vec<libc::pollfd> = fds
        .into_iter()
        .map(|(fd, writable)| libc::pollfd {
            fd,
            events: libc::POLLIN | if writable { libc::POLLOUT } else { 0 },
            revents: 0,
        })
        .collect();
    // SAFETY: a valid array of that many entries.
    let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, LONG.as_millis() as i32) };
    assert!(n > 0, "nothing to poll for: a wake-up was lost");
}

/// A rank that sends a list of messages and receives what comes, owning all memory that it posts.
pub(super) struct Rank {
    pub(super) channel: Box<dyn Channel>,
    to_send: VecDeque<Vec<u8>>,
    posted: VecDeque<(u64, Vec<u8>)>,
    sent: u64,
    landing: VecDeque<(u64, Vec<u8>)>,
    pub(super) received: Vec<Vec<u8>>,
    /// Receives posted at once.
    window: usize,
    /// Memory is registered as regions with this fabric before it is posted. Dropped before the
    /// memory is, message by message.
    regions: Option<Fabric>,
    held: VecDeque<(u64, Region)>,
    sources: VecDeque<(u64, Region)>,
}

impl Rank {
    pub(super) fn new(channel: Box<dyn Channel>, messages: Vec<Vec<u8>>) -> Rank {
        Rank {
            channel,
            to_send: messages.into(),
            posted: VecDeque::new(),
            sent: 0,
            landing: VecDeque::new(),
            received: Vec::new(),
            window: 1,
            regions: None,
            held: VecDeque::new(),
            sources: VecDeque::new(),
        }
    }

    /// One round; whether anything moved.
    pub(super) fn step(&mut self) -> Result<bool, ChannelError> {
        let mut moved = false;
        while let Some(message) = self.to_send.pop_front() {
            let token = self.sent + self.posted.len() as u64;
            if let Some(fabric) = &self.regions {
                // SAFETY: the region is dropped when the message is reported, before the memory.
                let region = unsafe { Region::register(fabric, message.as_ptr().cast_mut(), message.len()) };
                self.sources.push_back((token, region.unwrap()));
            }
            // SAFETY: the vector's memory stays in `posted` until it is reported sent.
            unsafe { self.channel.post_send(token, &header(token), message.as_ptr(), message.len())? };
            self.posted.push_back((token, message));
            moved = true;
        }
        while self.landing.len() < self.window
            && let Some(next) = self.channel.peek()?
        {
            let n = (self.received.len() + self.landing.len()) as u64;
            assert_eq!(next.header, header(n), "messages come in order");
            assert_eq!(self.channel.peek()?, Some(next), "peeking changes nothing");
            let mut memory = vec![0; next.len];
            if let Some(fabric) = &self.regions {
                // SAFETY: as above.
                let region = unsafe { Region::register(fabric, memory.as_mut_ptr(), next.len) };
                self.held.push_back((n, region.unwrap()));
            }
            // SAFETY: the vector's memory stays in `landing`, untouched, until it is reported.
            unsafe { self.channel.post_recv(n, memory.as_mut_ptr(), next.len)? };
            self.landing.push_back((n, memory));
            moved = true;
        }
        let mut done = Vec::new();
        let result = self.channel.progress(&mut done);
        for completion in done {
            match completion {
                Completion::Sent { token } => {
                    pop_if(&mut self.sources, |(n, _)| *n == token);
                    assert_eq!(self.posted.pop_front().unwrap().0, token, "sends complete in order");
                    self.sent += 1;
                }
                Completion::Received { token } => {
                    pop_if(&mut self.held, |(n, _)| *n == token);
                    let (n, memory) = self.landing.pop_front().unwrap();
                    assert_eq!(n, token, "receives complete in order");
                    self.received.push(memory);
                }
            }
        }
        result.map(|any| any || moved)
    }

    fn idle(&self) -> bool {
        self.to_send.is_empty() && self.posted.is_empty()
    }

    /// Until all of its messages are reported sent. The other side need not be driven for that
    /// as long as they are small.
    fn send_all(&mut self) {
        while !self.idle() {
            if !self.step().unwrap() {
                wait(&[&*self.channel]);
            }
        }
    }

    /// Drives this rank until its channel fails.
    pub(super) fn until_error(&mut self) -> ChannelError {
        loop {
            match self.step() {
                Err(e) => return e,
                Ok(true) => {}
                Ok(false) => wait(&[&*self.channel]),
            }
        }
    }
}

/// Runs two ranks until each has what the other sent.
fn exchange_between(left: &mut Rank, right: &mut Rank) {
    let (want_right, want_left) = (left.to_send.len(), right.to_send.len());
    loop {
        let moved = left.step().unwrap() | right.step().unwrap();
        let done = left.received.len() == want_left && right.received.len() == want_right;
        if done && left.idle() && right.idle() {
            return;
        }
        if !moved {
            wait(&[&*left.channel, &*right.channel]);
        }
    }
}

fn exchange((left, right): Pair, a: Vec<Vec<u8>>, b: Vec<Vec<u8>>) -> (Rank, Rank) {
    let (mut left, mut right) = (Rank::new(left, a), Rank::new(right, b));
    exchange_between(&mut left, &mut right);
    (left, right)
}

/// The whole contract over pairs that `pair` makes; `fabric` is theirs.
pub(super) fn channel_contract(fabric: &Fabric, pair: &dyn Fn() -> Pair) {
    messages_arrive_in_order_in_posted_memory(pair());
    both_sides_may_send_more_than_the_path_holds(pair());
    random_messages_keep_order_and_bytes(pair());
    for regions in [None, Some(fabric)] {
        several_receives_at_once(pair(), regions);
    }
    what_a_peer_sent_before_its_death_is_delivered_then_the_death(pair());
    a_peer_that_dies_in_the_middle_of_a_message_is_noticed_by_receiver_and_sender(pair());
    a_peer_that_never_reads_costs_bounded_memory(pair());
    misuse_is_an_error_and_does_no_harm(pair());
    for regions in [None, Some(fabric)] {
        nothing_lands_after_the_channel_is_gone(pair(), regions);
        what_is_alive_goes_on_landing(pair(), regions);
    }
    descriptors_are_named(pair());
}

fn messages_arrive_in_order_in_posted_memory(pair: Pair) {
    let messages: Vec<Vec<u8>> = [0, 1, 79, 80, 81, 0, 0, 4096, 40_000, 0, 1 << 20, 3]
        .iter()
        .map(|n| vec![*n as u8 + 1; *n])
        .collect();
    let (left, right) = exchange(pair, messages.clone(), vec![]);
    assert_eq!(right.received, messages);
    let (left, right) = (left.channel.counters(), right.channel.counters());
    let least: usize = messages.iter().map(|m| m.len() + 80).sum();
    assert!(left.bytes_sent as usize >= least && left.bytes_sent as usize <= least + 4096, "{left:?}");
    assert!(right.bytes_received as usize >= least && left.operations > 0, "{right:?}");
}

fn both_sides_may_send_more_than_the_path_holds(pair: Pair) {
    let big = || (0..3).map(|i| vec![i; 8 << 20]).collect::<Vec<_>>();
    let (left, right) = exchange(pair, big(), big());
    assert!(left.received == big() && right.received == big());
}

fn random_messages_keep_order_and_bytes(pair: Pair) {
    use rand::{RngExt, SeedableRng};
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let mut some = || {
        (0..rng.random_range(1..120))
            .map(|_| {
                let len = match rng.random_range(0..10) {
                    0..7 => rng.random_range(0..300),
                    7..9 => rng.random_range(0..200_000),
                    _ => rng.random_range(0..600_000),
                };
                let first: u8 = rng.random();
                (0..len).map(|i: usize| first.wrapping_add(i as u8)).collect::<Vec<u8>>()
            })
            .collect::<Vec<_>>()
    };
    let (a, b) = (some(), some());
    let (left, right) = exchange(pair, a.clone(), b.clone());
    assert!(left.received == b && right.received == a);
}

fn several_receives_at_once((left, right): Pair, regions: Option<&Fabric>) {
    let messages: Vec<Vec<u8>> =
        (0..40).map(|i| vec![i as u8; [0, 100, 300_000, 70_000, 33_000][i % 5]]).collect();
    let (mut left, mut right) = (Rank::new(left, messages.clone()), Rank::new(right, messages.clone()));
    for rank in [&mut left, &mut right] {
        (rank.window, rank.regions) = (8, regions.cloned());
    }
    exchange_between(&mut left, &mut right);
    assert!(left.received == messages && right.received == messages);
    if left.channel.transport() == "rdma" && regions.is_some() {
        let counters = left.channel.counters();
        // Only what was not offered was copied, once on each side.
        let small: usize = 2 * messages.iter().map(Vec::len).filter(|n| *n < 32 << 10).sum::<usize>();
        assert_eq!(counters.bytes_copied as usize, small, "{counters:?}");
    }
}

fn what_a_peer_sent_before_its_death_is_delivered_then_the_death((left, right): Pair) {
    let mut left = Rank::new(left, vec![vec![1; 100], vec![2; 200]]);
    left.send_all();
    drop(left);
    let mut right = Rank::new(right, vec![]);
    let error = right.until_error();
    assert_eq!(right.received, [vec![1; 100], vec![2; 200]]);
    assert!(matches!(&error, ChannelError::Closed { reason } if reason.contains("peer closed")), "{error}");
    // It stays failed, with the same reason.
    assert_eq!(right.step().unwrap_err().to_string(), error.to_string());
    // SAFETY: nothing is read, the channel has failed.
    let again = unsafe { right.channel.post_send(9, &header(9), std::ptr::null(), 0) };
    assert_eq!(again.unwrap_err().to_string(), error.to_string());
}

fn a_peer_that_dies_in_the_middle_of_a_message_is_noticed_by_receiver_and_sender((left, right): Pair) {
    // More than the path holds, so that it cannot be on its way entirely.
    let mut left = Rank::new(left, vec![vec![1; 64 << 20]]);
    let mut right = Rank::new(right, vec![vec![2; 64 << 20]]);
    while right.landing.is_empty() {
        left.step().unwrap();
        right.step().unwrap();
    }
    drop(left);
    let error = right.until_error();
    assert!(matches!(error, ChannelError::Closed { .. }), "{error}");
    assert!(right.received.is_empty() && right.sent == 0);
}

fn a_peer_that_never_reads_costs_bounded_memory((left, mut right): Pair) {
    let messages: Vec<Vec<u8>> = (0..300).map(|i| vec![i as u8; [70_000, 20_000, 0][i % 3]]).collect();
    let mut left = Rank::new(left, messages.clone());
    // Until nothing moves any more, twice in a row with a look at the descriptors between.
    let mut quiet = 0;
    while quiet < 50 {
        let moved = left.step().unwrap() | right.progress(&mut Vec::new()).unwrap();
        quiet = if moved { 0 } else { quiet + 1 };
        std::thread::yield_now();
    }
    assert!(!left.idle(), "the sender is held back");
    assert!(right.counters().bytes_received < 1 << 20, "{:?}", right.counters());
    // It reads after all.
    let mut right = Rank::new(right, vec![]);
    while right.received.len() < messages.len() {
        if !(left.step().unwrap() | right.step().unwrap()) {
            wait(&[&*left.channel, &*right.channel]);
        }
    }
    assert!(right.received == messages);
}

fn misuse_is_an_error_and_does_no_harm((left, right): Pair) {
    let (mut left, mut right) = (Rank::new(left, vec![vec![5; 10]]), right);
    // SAFETY: refused before the pointer is used.
    let early = unsafe { right.post_recv(0, std::ptr::null_mut(), 10) };
    assert!(matches!(early, Err(ChannelError::Misuse(_))));
    left.send_all();
    while right.peek().unwrap().is_none() {
        if !right.progress(&mut Vec::new()).unwrap() && right.peek().unwrap().is_none() {
            wait(&[&*right]);
        }
    }
    // SAFETY: refused before the pointer is used.
    let wrong = unsafe { right.post_recv(0, std::ptr::null_mut(), 11) };
    assert!(matches!(wrong, Err(ChannelError::Misuse(_))));
    let mut right = Rank::new(right, vec![]);
    while right.received.is_empty() {
        if !right.step().unwrap() && right.received.is_empty() {
            wait(&[&*right.channel]);
        }
    }
    assert_eq!(right.received, [[5; 10]]);
}

/// A large message that has been asked for and of which not all has come: sender, receiver, memory.
fn half_way(
    (left, mut right): Pair,
    regions: Option<&Fabric>,
) -> (Rank, Box<dyn Channel>, Vec<u8>, Option<Region>) {
    let mut left = Rank::new(left, vec![vec![9; 20 << 20]]);
    let next = loop {
        left.step().unwrap();
        right.progress(&mut Vec::new()).unwrap();
        if let Some(next) = right.peek().unwrap() {
            break next;
        }
    };
    let mut memory = vec![0u8; next.len];
    // SAFETY: the caller drops the region before the memory.
    let region = regions.map(|f| unsafe { Region::register(f, memory.as_mut_ptr(), next.len) }.unwrap());
    // SAFETY: the caller keeps the memory as long as the channel, and looks at it only by `read`.
    unsafe { right.post_recv(0, memory.as_mut_ptr(), next.len).unwrap() };
    // What asks for it is on its way; the sender has not seen it yet.
    right.progress(&mut Vec::new()).unwrap();
    (left, right, memory, region)
}

/// Bytes that have landed.
fn landed(memory: &[u8]) -> usize {
    // Volatile, because a device may be writing.
    // SAFETY: within the slice.
    (0..memory.len()).filter(|i| unsafe { std::ptr::read_volatile(&memory[*i]) } != 0).count()
}

fn nothing_lands_after_the_channel_is_gone(pair: Pair, regions: Option<&Fabric>) {
    let (mut left, right, memory, region) = half_way(pair, regions);
    drop(right);
    let before = landed(&memory);
    assert!(before < memory.len(), "some was still to come");
    // The sender goes on until it notices.
    let error = left.until_error();
    assert!(matches!(error, ChannelError::Closed { .. } | ChannelError::Device { .. }), "{error}");
    assert_eq!(landed(&memory), before);
    drop(region);
}

/// The control of the test above: without the end, more lands.
fn what_is_alive_goes_on_landing(pair: Pair, regions: Option<&Fabric>) {
    let (mut left, mut right, memory, region) = half_way(pair, regions);
    let before = landed(&memory);
    let mut done = Vec::new();
    while done.is_empty() {
        let moved = left.step().unwrap() | right.progress(&mut done).unwrap();
        if !moved && done.is_empty() {
            wait(&[&*left.channel, &*right]);
        }
    }
    assert!(before < landed(&memory) && landed(&memory) == memory.len());
    drop((right, region));
}

fn descriptors_are_named((left, right): Pair) {
    for channel in [left, right] {
        let (mut polled, mut forked) = (Vec::new(), Vec::new());
        channel.poll_fds(&mut polled);
        channel.fork_fds(&mut forked);
        assert!(!polled.is_empty() && polled.iter().all(|(fd, _)| forked.contains(fd)));
        for fd in forked {
            // SAFETY: a plain system call.
            let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
            assert!(flags >= 0 && flags & libc::FD_CLOEXEC != 0, "open, and closed by exec");
        }
    }
}
