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
#[test]
fn presenting_the_public_key_is_not_enough() {
    let ours = Tls::new(&ClusterSecret::from_bytes([1; 32])).unwrap();
    let key = key_of(&ClusterSecret::from_bytes([2; 32])).unwrap();
    let right = key_of(&ClusterSecret::from_bytes([1; 32])).unwrap();
    let public = CertificateDer::from(right.public_key().unwrap().to_vec());
    let liar = Arc::new(CertifiedKey::new(vec![public], key));
    let server = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::server::AlwaysResolvesServerRawPublicKeys::new(liar)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(server));
        let (near, _far) = tokio::join!(ours.connect(near), acceptor.accept(far));
        assert!(near.is_err(), "a signature by another key was accepted");
    });
}
