//! One life of the connection to the scheduler.

use crate::config::AgentConfig;
use crate::rank::Ranks;
use crate::{files, logs, sys};
use firefly_proto::auth::AddToken;
use firefly_proto::scheduler as wire;
use firefly_proto::scheduler::agent_gateway_client::AgentGatewayClient;
use firefly_proto::scheduler::agent_order::Order;
use firefly_proto::scheduler::agent_report::Report;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

/// Signs of life go up this often.
const PING: Duration = Duration::from_secs(1);
/// Without an answer for so long the connection is given up.
const SILENCE: Duration = Duration::from_secs(10);
/// Ranks are looked at this often even if no shim rings.
const LOOK: Duration = Duration::from_millis(200);
/// A scheduler that takes nothing for so long has its connection given up.
const SEND: Duration = Duration::from_secs(10);

/// Who we are and what we have.
pub(crate) struct Host {
    pub(crate) name: String,
    pub(crate) cores: u32,
    pub(crate) memory_bytes: u64,
    pub(crate) gpus: u32,
    pub(crate) incarnation: u64,
}

impl Host {
    pub(crate) fn find_out() -> Self {
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
        let cores = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1));
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let kib: u64 = meminfo
            .lines()
            .find_map(|l| l.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok())
            .unwrap_or(0);
        let gpus = std::fs::read_dir("/dev").map_or(0, |entries| {
            let names = entries.flatten().filter_map(|e| e.file_name().into_string().ok());
            let cards = names.filter(|n| {
                n.strip_prefix("nvidia")
                    .is_some_and(|d| !d.is_empty() && d.bytes().all(|b| b.is_ascii_digit()))
            });
            u32::try_from(cards.count()).unwrap_or(0)
        });
        let incarnation = u64::try_from(sys::boottime().as_nanos()).unwrap_or(0);
        Self { name, cores, memory_bytes: kib * 1024, gpus, incarnation }
    }
}

/// Connects and serves until the connection breaks (the error says why) or `stop` fires.
pub(crate) async fn attach(
    config: &AgentConfig,
    host: &Host,
    ranks: &mut Ranks,
    wake: &mut Receiver,
    stop: &CancellationToken,
    connected: &mut bool,
) -> Result<(), String> {
    let endpoint = firefly_proto::dial::endpoint(&config.scheduler)
        .map_err(|e| e.to_string())?
        .connect_timeout(Duration::from_secs(3));
    let channel = endpoint.connect().await.map_err(|e| chain(&e))?;
    let mut client = AgentGatewayClient::with_interceptor(channel, AddToken::new(&config.secret));
    let (up, reports) = mpsc::channel::<wire::AgentReport>(64);
    ranks.new_stream();
    let hello = wire::AgentHello {
        node_id: config.node_id.0,
        host: host.name.clone(),
        address: config.address.clone(),
        cores: host.cores,
        memory_bytes: host.memory_bytes,
        gpus: host.gpus,
        incarnation: host.incarnation,
        running: ranks.inventory(),
        slots: config.slots.unwrap_or(host.cores),
    };
    send(&up, Report::Hello(hello)).await?;
    let call = tokio::time::timeout(SEND, client.attach(ReceiverStream::new(reports)));
    let mut orders =
        call.await.map_err(|_| "no answer to the hello")?.map_err(|e| e.message().to_owned())?.into_inner();

    let mut ping = tokio::time::interval(PING);
    let mut look = tokio::time::interval(LOOK);
    look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut sequence = 0;
    let mut pings: VecDeque<(u64, Duration)> = VecDeque::new();
    let mut heard = sys::boottime();
    let mut rung = [0; 4096];
    loop {
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            order = orders.next() => match order {
                Some(Ok(order)) => {
                    heard = sys::boottime();
                    let answer = match order.order {
                        Some(Order::Prepare(o)) => ranks.prepare(o),
                        Some(Order::Start(o)) => { ranks.start(&o); None }
                        Some(Order::Stop(o)) => ranks.stop(&o),
                        Some(Order::Forget(o)) => { ranks.forget(&o); None }
                        Some(Order::LogAck(o)) => { ranks.log_ack(&o); None }
                        Some(Order::Pong(pong)) => {
                            *connected = true;
                            while pings.front().is_some_and(|(s, _)| *s <= pong.sequence) {
                                // The lease counts from when the ping was sent: the scheduler was
                                // alive after that, whatever took how long since.
                                let sent = pings.pop_front().map(|(_, at)| at);
                                relay(config, sent.unwrap_or_default());
                            }
                            None
                        }
                        None => None,
                    };
                    if let Some(report) = answer {
                        send(&up, Report::Rank(report)).await?;
                    }
                    // An acknowledgement opens the window for more lines.
                    pump(&up, ranks).await?;
                }
                Some(Err(status)) => return Err(status.message().to_owned()),
                None => return Err("the scheduler closed the connection".into()),
            },
            _ = ping.tick() => {
                if sys::boottime().saturating_sub(heard) > SILENCE {
                    return Err(format!("the scheduler has been silent for {} s", SILENCE.as_secs()));
                }
                sequence += 1;
                pings.push_back((sequence, sys::boottime()));
                send(&up, Report::Ping(wire::Ping { sequence })).await?;
            }
            read = wake.read(&mut rung) => {
                read.map_err(|e| format!("the wake fifo: {e}"))?;
                look_around(&up, ranks).await?;
            }
            _ = look.tick() => look_around(&up, ranks).await?,
        }
    }
}

async fn look_around(up: &mpsc::Sender<wire::AgentReport>, ranks: &mut Ranks) -> Result<(), String> {
    let changes = ranks.changes();
    // Lines first: whoever sees the end of a rank has seen what it said.
    pump(up, ranks).await?;
    for report in changes {
        send(up, Report::Rank(report)).await?;
    }
    Ok(())
}

async fn pump(up: &mpsc::Sender<wire::AgentReport>, ranks: &mut Ranks) -> Result<(), String> {
    // Bounded, so that orders and pings get their turn.
    for _ in 0..4 {
        let messages = logs::next(ranks);
        if messages.is_empty() {
            break;
        }
        for message in messages {
            send(up, Report::Log(message)).await?;
        }
    }
    Ok(())
}

async fn send(up: &mpsc::Sender<wire::AgentReport>, report: Report) -> Result<(), String> {
    match tokio::time::timeout(SEND, up.send(wire::AgentReport { report: Some(report) })).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err("the connection broke".into()),
        Err(_) => Err("the scheduler takes nothing".into()),
    }
}

/// Relays the scheduler's sign of life to the shims.
fn relay(config: &AgentConfig, at: Duration) {
    let path = config.state_dir.join("lease");
    if let Err(e) = files::replace(&path, at.as_nanos().to_string().as_bytes(), 0o600, false) {
        tracing::warn!(error = %e, "cannot relay the scheduler's sign of life to the shims");
    }
}

/// An error with its causes: tonic's own text says only "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}
