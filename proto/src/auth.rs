//! Bearer tokens on gRPC: the client side adds one to each request, the server side refuses
//! requests without the right one. Compared in constant time.

use firefly_types::ClusterSecret;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::{Request, Status};

/// Adds the token to every request.
#[derive(Clone)]
pub struct AddToken(MetadataValue<Ascii>);

impl AddToken {
    /// A client-side interceptor that proves membership by `secret`.
    pub fn new(secret: &ClusterSecret) -> Self {
        let header = format!("Bearer {}", secret.bearer_token());
        let mut value: MetadataValue<Ascii> = header.parse().expect("hexadecimal digits are ASCII");
        value.set_sensitive(true);
        Self(value)
    }
}

impl tonic::service::Interceptor for AddToken {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// Refuses requests that do not carry the token.
#[derive(Clone)]
pub struct CheckToken {
    secret: ClusterSecret,
    expected: [u8; 32],
}

impl CheckToken {
    /// A server-side interceptor for the members who hold `secret`.
    pub fn new(secret: &ClusterSecret) -> Self {
        let expected = secret.prove(&[secret.bearer_token().as_bytes()]);
        Self { secret: secret.clone(), expected }
    }
}

impl tonic::service::Interceptor for CheckToken {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let token = request
            .metadata()
            .get("authorization")
            .and_then(|v| v.to_str().ok())
            .and_then(|v| v.strip_prefix("Bearer "))
            .ok_or_else(|| {
                Status::unauthenticated("no token: point FIREFLY_STATE or --state at the cluster's folder")
            })?;
        // Comparing MACs of the tokens hides, in time, how much of a wrong token was right.
        if self.secret.verify(&[token.as_bytes()], &self.expected) {
            Ok(request)
        } else {
            Err(Status::unauthenticated("wrong token: this command holds the secret of another cluster"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::service::Interceptor;

    #[test]
    fn only_the_right_token_passes() {
        let secret = ClusterSecret::from_bytes([1; 32]);
        let mut check = CheckToken::new(&secret);
        let with = |s: &ClusterSecret| AddToken::new(s).call(Request::new(())).unwrap();
        assert!(check.call(with(&secret)).is_ok());
        assert!(check.call(with(&ClusterSecret::from_bytes([2; 32]))).is_err());
        assert!(check.call(Request::new(())).is_err());
    }
}
