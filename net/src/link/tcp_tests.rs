use super::*;
use crate::link::contract::link_contract;
use crate::rpc::tests::rpc_contract;
use tokio::net::TcpListener;

async fn pair() -> ((TcpTx, TcpRx), (TcpTx, TcpRx)) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    (split(client, LinkOptions::of_tests()), split(server, LinkOptions::of_tests()))
}

#[tokio::test]
async fn tcp_keeps_the_links_contract() {
    let (client, server) = pair().await;
    assert_eq!(link_contract(client, server).await, 24);
}

#[tokio::test]
async fn tcp_carries_rpc() {
    let (client, server) = pair().await;
    assert_eq!(rpc_contract(client, server).await, 55);
}
