"""What a bucket's server says no with, as a reason and what helps."""

from fsspec.core import url_to_fs

SENTENCES = {
    "ExpiredToken": "the credentials have expired; renew the AWS_* variables and run the same "
    "command again, finished work is kept",
    "InvalidAccessKeyId": "the server does not know the key in AWS_ACCESS_KEY_ID; set that of this "
    "server, or AWS_ENDPOINT_URL to the one that is meant",
    "NoSuchBucket": "there is no such bucket; make it, {remedy}, or set AWS_ENDPOINT_URL to the "
    "server that has it",
    "RequestTimeTooSkewed": "this machine's clock and the server's are too far apart; set the "
    "clock (timedatectl set-ntp true) and run the same command again",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID; set both",
    # of botocore itself, which asks no server
    "EndpointConnectionError": "{error}; check AWS_ENDPOINT_URL, and that the server runs",
    "NoCredentialsError": "there are no credentials; set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, on every node",
    "PartialCredentialsError": "of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY one is missing; set "
    "both, on every node",
}


HEAD_REFUSED = ("400", "403")


def code_of(error: Exception) -> str:
    """S3's word for what went wrong, which s3fs keeps as the cause of its own error, or botocore's.

    The answer to a HEAD has no word, only a number.
    """
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return type(error).__name__


def told(error: Exception, uri: str, remedy: str = "choose another") -> str | None:
    """Why, and what to do; None for what is no bucket's matter, or has no better words."""
    code = code_of(error)
    if code in HEAD_REFUSED:
        code = _word_for(uri)
    sentence = SENTENCES.get(code)
    return sentence and sentence.format(error=str(error).rstrip("."), remedy=remedy)


def _word_for(uri: str) -> str:
    """What a request is refused with whose answer has words."""
    fs, path = url_to_fs(uri)
    try:
        fs.call_s3("list_objects_v2", Bucket=path.split("/")[0], MaxKeys=1)
    except Exception as error:
        return code_of(error)
    return ""
