//! Client sessions: who may use the file system, under which epoch, until when.

use firefly_types::{AttemptEpoch, ClientId, ErrorKind, JobId, Nanos, SessionEpoch, WireError};
use std::collections::BTreeMap;
use std::time::Duration;

/// Sessions at most: bounds memory; a mount or a process with the library needs one.
pub const MAX_SESSIONS: usize = 65_536;

/// What is durable of a session.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Session {
    /// Servers refuse requests of the client under an older one.
    pub epoch: SessionEpoch,
    /// For people.
    pub description: String,
    /// The job whose process the client is.
    pub job: Option<(JobId, AttemptEpoch)>,
}

/// All sessions, and when they end.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    lease: Duration,
    live: BTreeMap<ClientId, (Session, Nanos)>,
    /// The next new client's id.
    pub next_client: u64,
    /// The next session's epoch, over all clients.
    pub next_epoch: u64,
}

impl Sessions {
    /// Restores sessions; each gets a full lease from `now`, since nobody knows when they were
    /// renewed last.
    pub(crate) fn restore(
        lease: Duration,
        stored: BTreeMap<ClientId, Session>,
        next_client: u64,
        next_epoch: u64,
        now: Nanos,
    ) -> Self {
        let until = now.after(lease);
        let live = stored.into_iter().map(|(client, session)| (client, (session, until))).collect();
        Self { lease, live, next_client, next_epoch }
    }

    pub(crate) fn durable(&self) -> BTreeMap<ClientId, Session> {
        self.live.iter().map(|(client, (session, _))| (*client, session.clone())).collect()
    }

    pub(crate) fn get(&self, client: ClientId) -> Option<&Session> {
        self.live.get(&client).map(|(session, _)| session)
    }

    /// Opens a session. Returns the client, its epoch, and the clients whose sessions ended by it:
    /// processes of older attempts of the same job.
    pub(crate) fn open(
        &mut self,
        client: Option<ClientId>,
        description: String,
        job: Option<(JobId, AttemptEpoch)>,
        now: Nanos,
    ) -> Result<(ClientId, SessionEpoch, Vec<ClientId>), WireError> {
        if let Some(client) = client
            && client.0 >= self.next_client
        {
            return Err(WireError::new(
                ErrorKind::InvalidArgument,
                format!("{client} was never given out by this manager; ask for a new id with client_id 0"),
            ));
        }
        let mut ended = Vec::new();
        if let Some((job, attempt)) = job {
            for (&other, (session, _)) in &self.live {
                match session.job {
                    Some((j, a)) if j == job && a > attempt => {
                        return Err(WireError::new(
                            ErrorKind::Stale,
                            format!("attempt {attempt} of {job} is over: attempt {a} has started"),
                        ));
                    }
                    Some((j, a)) if j == job && a < attempt => ended.push(other),
                    _ => {}
                }
            }
        }
        let is_new = client.is_none_or(|c| !self.live.contains_key(&c));
        if is_new && self.live.len() - ended.len() >= MAX_SESSIONS {
            return Err(WireError::new(
                ErrorKind::Unavailable,
                format!("{MAX_SESSIONS} clients have sessions, which is the limit; unmount some"),
            ));
        }
        for client in &ended {
            self.live.remove(client);
        }
        let client = client.unwrap_or_else(|| {
            self.next_client += 1;
            ClientId(self.next_client - 1)
        });
        let epoch = SessionEpoch(self.next_epoch);
        self.next_epoch += 1;
        self.live.insert(client, (Session { epoch, description, job }, now.after(self.lease)));
        ended.retain(|c| *c != client);
        Ok((client, epoch, ended))
    }

    pub(crate) fn renew(
        &mut self,
        client: ClientId,
        epoch: SessionEpoch,
        now: Nanos,
    ) -> Result<(), WireError> {
        match self.live.get_mut(&client) {
            Some((session, until)) if session.epoch == epoch => {
                *until = now.after(self.lease);
                Ok(())
            }
            _ => Err(WireError::new(
                ErrorKind::Stale,
                format!("session {epoch} of {client} has ended; open a new one"),
            )),
        }
    }

    /// Whether a session ended by this. Closing one that has ended is no error: the answer to the
    /// first try may have been lost.
    pub(crate) fn close(&mut self, client: ClientId, epoch: SessionEpoch) -> bool {
        let is_it = self.live.get(&client).is_some_and(|(session, _)| session.epoch == epoch);
        if is_it {
            self.live.remove(&client);
        }
        is_it
    }

    /// Ends what has run out.
    pub(crate) fn expire(&mut self, now: Nanos) -> Vec<(ClientId, Session)> {
        let over: Vec<ClientId> =
            self.live.iter().filter(|(_, (_, until))| *until < now).map(|(client, _)| *client).collect();
        over.into_iter().filter_map(|c| self.live.remove(&c).map(|(session, _)| (c, session))).collect()
    }

    /// Moves all ends back.
    pub(crate) fn grant_grace(&mut self, by: Duration) {
        for (_, until) in self.live.values_mut() {
            *until = until.after(by);
        }
    }
}
