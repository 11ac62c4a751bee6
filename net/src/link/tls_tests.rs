use super::*;
use crate::link::contract::link_contract;
use crate::rpc::tests::rpc_contract;
use tokio::net::TcpListener;

type Pair = (TcpTx<TlsWrite>, TcpRx<TlsRead>);

fn of(secret: u8) -> Tls {
    Tls::new(&ClusterSecret::from_bytes([secret; 32])).unwrap()
}

async fn meet(
    client: u8,
    server: u8,
) -> (Result<TlsStream<TcpStream>, HandshakeError>, Result<TlsStream<TcpStream>, HandshakeError>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (far, _) = listener.accept().await.unwrap();
    let (near_tls, far_tls) = (of(client), of(server));
    tokio::join!(near_tls.connect(near), far_tls.accept(far))
}

async fn pair() -> (Pair, Pair) {
    let (near, far) = meet(1, 1).await;
    let halves = |stream| split(stream, LinkOptions::of_tests()).unwrap();
    (halves(near.unwrap()), halves(far.unwrap()))
}

#[tokio::test]
async fn tls_keeps_the_links_contract() {
    let (client, server) = pair().await;
    assert_eq!(link_contract(client, server).await, 24);
}

#[tokio::test]
async fn tls_carries_rpc() {
    let (client, server) = pair().await;
    assert_eq!(rpc_contract(client, server).await, 55);
}

#[tokio::test]
async fn the_key_of_another_secret_is_refused_on_both_sides() {
    let (near, far) = meet(1, 2).await;
    assert_eq!(near.err(), Some(HandshakeError::WrongSecret));
    assert_eq!(far.err(), Some(HandshakeError::WrongSecret));
}

/// A server that presents the right key, which is no secret, without holding it.
#[tokio::test]
async fn presenting_the_public_key_is_not_enough() {
    let key = |secret| key_of(&ClusterSecret::from_bytes([secret; 32])).unwrap();
    let right = key(1).public_key().unwrap().into_owned();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    for (signs_with, met) in [(1, true), (2, false)] {
        let server = Tls::assemble(right.clone(), key(signs_with)).unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        let client = of(1);
        let (near, _far) = tokio::join!(client.connect(near), server.accept(far));
        assert_eq!(near.err(), (!met).then_some(HandshakeError::WrongSecret));
    }
}
