//! TLS under the TCP carrier, for networks that are not trusted: both sides prove with one Ed25519
//! key, derived from the cluster's secret, that they are members, and the handshake of every
//! connection follows inside. No certificates: the key itself is presented (RFC 7250) and compared.

use super::tcp::{ReadHalf, TcpRx, TcpTx, WriteHalf};
use super::{LinkOptions, tcp};
use crate::error::HandshakeError;
use firefly_types::ClusterSecret;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{
    AlertDescription, CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error,
    ServerConfig, SignatureScheme,
};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// What comes before the 32 bytes of an Ed25519 seed in PKCS #8 (RFC 8410).
const PKCS8: [u8; 16] = *b"\x30\x2e\x02\x01\x00\x30\x05\x06\x03\x2b\x65\x70\x04\x22\x04\x20";
/// First byte of every TLS connection: a handshake record. No other handshake here starts so.
const RECORD: u8 = 0x16;
/// A fatal alert "protocol version" (RFC 8446): how a server without TLS tells one that wants it.
const NO_TLS: [u8; 7] = [0x15, 3, 3, 0, 2, 2, 70];

/// Both roles of one cluster's members.
#[derive(Clone)]
pub(crate) struct Tls {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
}

impl Tls {
    pub(crate) fn new(secret: &ClusterSecret) -> Result<Tls, HandshakeError> {
        let setup = |e: Error| HandshakeError::Tls(format!("TLS cannot be set up: {e}"));
        let key = key_of(secret).map_err(setup)?;
        let public =
            key.public_key().ok_or_else(|| setup(Error::General("no public key".into())))?.into_owned();
        let certified = Arc::new(CertifiedKey::new(vec![CertificateDer::from(public.to_vec())], key));
        let provider = Arc::new(ring::default_provider());
        let members = Arc::new(Members { public, provider: provider.clone() });

        let mut client = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(setup)?
            .dangerous()
            .with_custom_certificate_verifier(members.clone())
            .with_client_cert_resolver(Arc::new(rustls::client::AlwaysResolvesClientRawPublicKeys::new(
                certified.clone(),
            )));
        // Connections live long; every one of them proves both sides.
        client.resumption = rustls::client::Resumption::disabled();
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(setup)?
            .with_client_cert_verifier(members)
            .with_cert_resolver(Arc::new(rustls::server::AlwaysResolvesServerRawPublicKeys::new(certified)));
        server.send_tls13_tickets = 0;
        Ok(Tls { connector: Arc::new(client).into(), acceptor: Arc::new(server).into() })
    }

    /// The dialling side.
    pub(crate) async fn connect(&self, stream: TcpStream) -> Result<TlsStream<TcpStream>, HandshakeError> {
        let name = ServerName::try_from("firefly").expect("a valid name, which nobody looks at");
        Ok(self.connector.connect(name, stream).await.map_err(refused)?.into())
    }

    /// The dialled side. A peer that does not begin with TLS is left as it is, for its own
    /// handshake to refuse.
    pub(crate) async fn accept(&self, stream: TcpStream) -> Result<TlsStream<TcpStream>, HandshakeError> {
        Ok(self.acceptor.accept(stream).await.map_err(refused)?.into())
    }
}

/// The key that all members of a cluster derive from its secret.
fn key_of(secret: &ClusterSecret) -> Result<Arc<dyn SigningKey>, Error> {
    let mut key = PKCS8.to_vec();
    // HMAC of a label with the secret as its key: one block of HKDF's expansion (RFC 5869).
    key.extend_from_slice(&secret.prove(&[b"firefly net tls key 1"]));
    ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(key))
}

/// Whether the peer begins with TLS. Nothing is taken from the stream.
pub(crate) async fn begins_with_tls(stream: &TcpStream) -> io::Result<bool> {
    let mut first = [0];
    Ok(stream.peek(&mut first).await? == 1 && first[0] == RECORD)
}

/// Tells a peer that began with TLS that there is none here.
pub(crate) async fn tell_no_tls(stream: &mut TcpStream) {
    // Whether it is heard is the peer's affair.
    let _ = stream.write_all(&NO_TLS).await;
    let _ = stream.shutdown().await;
}

fn refused(error: io::Error) -> HandshakeError {
    let Some(tls) = error.get_ref().and_then(|e| e.downcast_ref::<Error>()) else {
        return HandshakeError::Ended(error.to_string());
    };
    match tls {
        Error::InvalidCertificate(_)
        | Error::AlertReceived(
            AlertDescription::BadCertificate
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError
            | AlertDescription::CertificateUnknown,
        ) => HandshakeError::WrongSecret,
        Error::AlertReceived(AlertDescription::ProtocolVersion) => HandshakeError::Tls(
            "this side uses TLS and the server does not; set `tls` alike on both".to_owned(),
        ),
        other => HandshakeError::Tls(other.to_string()),
    }
}

/// Who holds the key derived from the secret is a member.
#[derive(Debug)]
struct Members {
    public: SubjectPublicKeyInfoDer<'static>,
    provider: Arc<CryptoProvider>,
}

impl Members {
    fn check(&self, presented: &CertificateDer<'_>) -> Result<(), Error> {
        if presented.as_ref() == self.public.as_ref() {
            return Ok(());
        }
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn verify(
        &self,
        message: &[u8],
        presented: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(presented.as_ref());
        verify_tls13_signature_with_raw_key(
            message,
            &key,
            signed,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken here".into()))
    }
}

impl ServerCertVerifier for Members {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Members {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Self::no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verify(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// Makes both halves of a connected, authenticated stream.
pub(crate) fn split(
    stream: TlsStream<TcpStream>,
    options: LinkOptions,
) -> io::Result<(TcpTx<TlsWrite>, TcpRx<TlsRead>)> {
    // The halves share the stream behind a lock; the pulse looks at the socket without it.
    let socket = stream.get_ref().0.as_fd().try_clone_to_owned()?;
    let (read, write) = tokio::io::split(stream);
    Ok(tcp::link(TlsRead { stream: read, socket }, TlsWrite(write), options))
}

pub(crate) struct TlsRead {
    stream: tokio::io::ReadHalf<TlsStream<TcpStream>>,
    socket: OwnedFd,
}

impl AsyncRead for TlsRead {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl ReadHalf for TlsRead {
    fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

pub(crate) struct TlsWrite(tokio::io::WriteHalf<TlsStream<TcpStream>>);

impl AsyncWrite for TlsWrite {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl WriteHalf for TlsWrite {
    const NAME: &'static str = "tls";

    fn try_write_vectored(&self, _pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        // The writer's affair: encrypting needs the stream's lock.
        Err(io::ErrorKind::WouldBlock.into())
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
